"""Upload a registered model to the hub."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Any

from rlhf_pipeline.errors import BadInput, RunFailed
from rlhf_pipeline.registry.store import Registry

HUB_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")


def push(registry: Registry, reference: str, name: str, *, private: bool = False) -> dict[str, Any]:
    """Upload the files of a model with its card and manifest, and return what was uploaded and its address.

    The repository is made if it does not exist. The token is that of huggingface_hub: HF_TOKEN, or `hf auth login`.

    Raises:
        BadInput: the name is not org/name, or the reference is not a model of the registry.
        DamagedFile: a file differs from the manifest. RunFailed: the hub refused, or could not be reached.
    """
    if not HUB_NAME.fullmatch(name) or "--" in name or ".." in name:
        raise BadInput(f"found {name!r}, expected the name of a repository on the hub: org/name")
    label = registry.resolve(reference).label
    with tempfile.TemporaryDirectory() as folder:
        copy = registry.export(reference, Path(folder) / "model")
        files = sorted(path.relative_to(copy).as_posix() for path in copy.rglob("*") if path.is_file())
        from huggingface_hub import HfApi
        from huggingface_hub.errors import (
            HfHubHTTPError,
            HFValidationError,
            LocalTokenNotFoundError,
            OfflineModeIsEnabled,
        )

        api = HfApi()
        try:
            url = api.create_repo(name, private=private or None, exist_ok=True)
            api.upload_folder(repo_id=name, folder_path=copy, commit_message=f"Upload {label}")
        except HFValidationError as error:
            raise BadInput(f"{name}: {error}") from None
        except LocalTokenNotFoundError:
            raise RunFailed(f"{name}: found no token of the hub; set HF_TOKEN, or run hf auth login") from None
        except (HfHubHTTPError, OfflineModeIsEnabled, OSError) as error:
            said = str(error).strip().splitlines()
            why = said[0] if said else type(error).__name__
            fix = "check the token (HF_TOKEN, hf auth login), its right to write, and the network"
            raise RunFailed(f"{name}: the hub did not take {label}: {why}; {fix}") from None
    return {"model": label, "repository": name, "url": str(url), "private": private, "files": files}
