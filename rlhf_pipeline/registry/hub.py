"""Upload a registered model to the hub."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from rlhf_pipeline.config.names import DATA_SUFFIXES, HUB_ID
from rlhf_pipeline.errors import BadInput, RunFailed, first_line
from rlhf_pipeline.registry.adapters import ADAPTER_CONFIG
from rlhf_pipeline.registry.card import escape
from rlhf_pipeline.registry.digests import CARD, MANIFEST, file_entry, list_files
from rlhf_pipeline.registry.manifest import Manifest, read_manifest
from rlhf_pipeline.registry.store import Registry

_LOCAL = re.compile(r"(~|\.{0,2}/|[A-Za-z]:\\)[^\n]*")


def push(registry: Registry, reference: str, name: str, *, private: bool = False) -> dict[str, Any]:
    """Upload the files of a model with its card and manifest, and return what was uploaded and its address.

    Local paths are not uploaded: the name of their file stands in their place (`hide_paths`).
    The repository is made if it does not exist. The token is that of huggingface_hub: HF_TOKEN, or `hf auth login`.

    Raises:
        BadInput: the name is not org/name, or the reference is not a model of the registry.
        DamagedFile: a file differs from the manifest. RunFailed: the hub refused, or could not be reached.
    """
    if not re.fullmatch(HUB_ID, name) or "--" in name or ".." in name:
        raise BadInput(f"found {name!r}, expected the name of a repository on the hub: org/name")
    label = registry.resolve(reference).label
    with tempfile.TemporaryDirectory() as folder:
        copy = registry.export(reference, Path(folder) / "model")
        hide_paths(copy)
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
            fix = "check the token (HF_TOKEN, hf auth login), its right to write, and the network"
            raise RunFailed(f"{name}: the hub did not take {label}: {first_line(error)}; {fix}") from None
    return {"model": label, "repository": name, "url": str(url), "private": private, "files": files}


def hide_paths(copy: Path) -> None:
    """Replace local paths in the manifest, card and adapter's config of a copy by the names of their files.

    The digests of data and parents stand beside the names. The user's home directory becomes `~`.
    """
    manifest = read_manifest(copy)
    names = {path: re.split(r"[/\\]", path.rstrip("/\\"))[-1] for path in _paths(manifest)}
    home = str(Path("~").expanduser())
    if len(home) > 1:
        names[f"{home}/"] = "~/"
    order = sorted(filter(names.get, names), key=len, reverse=True)

    def hidden(text: str) -> str:
        for path in order:
            text = text.replace(path, names[path])
        return text

    if (file := copy / ADAPTER_CONFIG).is_file():
        settings = json.loads(file.read_text(encoding="utf-8"))
        file.write_text(json.dumps(_mapped(settings, hidden), indent=2) + "\n", encoding="utf-8")
    card = copy / CARD
    text = card.read_text(encoding="utf-8")
    for path in order:
        text = text.replace(escape(path), escape(names[path]))
    card.write_text(hidden(text), encoding="utf-8")
    told = _mapped(manifest.model_dump(mode="json", exclude={"files"}), hidden)
    files = {path: file_entry(file) for path, file in list_files(copy).items()}
    (copy / MANIFEST).write_text(Manifest.model_validate({**told, "files": files}).to_json(), encoding="utf-8")


def _paths(manifest: Manifest) -> Iterator[str]:
    """The values of a manifest that are local paths. A parent with a digest is a folder or a model of the registry."""
    yield from (parent.ref for parent in manifest.parents.values() if parent.digest and "/" in parent.ref)
    for text in _texts(manifest.model_dump(mode="json", exclude={"files"})):
        inside = "/" in text and ":" not in text and text.lower().endswith(DATA_SUFFIXES)
        if _LOCAL.fullmatch(text) or (inside and "\n" not in text):
            yield text


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(item)


def _mapped(value: Any, change: Callable[[str], str]) -> Any:
    """The value with every text in it changed, names of fields included."""
    if isinstance(value, Mapping):
        return {change(key): _mapped(item, change) for key, item in value.items()}
    if isinstance(value, list):
        return [_mapped(item, change) for item in value]
    return change(value) if isinstance(value, str) else value
