from __future__ import annotations

import errno

import pytest

from rlhf_pipeline.cli.main import main
from rlhf_pipeline.registry.repair import registry_faults
from tests.faults.disks import disk_full, read_only


@pytest.mark.check
@pytest.mark.slow
def test_a_full_disk_is_said_in_one_line_and_the_run_goes_on_when_there_is_room(tmp_path) -> None:
    found = disk_full(3, tmp_path, mount=False, only=("publish",))
    assert found["ok"] and found["full"] >= 2, found


@pytest.mark.check
@pytest.mark.slow
def test_a_home_that_may_not_be_written_is_said_in_one_line(tmp_path) -> None:
    found = read_only(tmp_path, only=("publish", "collect"))
    assert found["ok"], found


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES])
@pytest.mark.parametrize("library", ["python", "rust"])
def test_a_version_that_cannot_be_written_is_not_there(lab, capsys, monkeypatch, number, library) -> None:
    def fail(*_args, **_options):
        if library == "rust":
            raise RuntimeError(f"Error while serializing: I/O error: something (os error {number})")
        raise OSError(number, "something")

    config = lab.home.parent / "dpo.yaml"
    config.write_text(
        "output_name: more\nmodel_name_or_path: sft\ndataset_name: collected:pairs\nmax_steps: 1\nuse_cpu: true\n"
    )
    words = ["dpo", "--config", str(config), "--home", str(lab.home), "num_threads=1"]
    monkeypatch.setattr("rlhf_pipeline.stages.publish.save_model", fail)
    assert main(words) == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and str(lab.home / "models") in errors[0], errors
    assert ("disk full" if number in (errno.ENOSPC, errno.EDQUOT) else "no permission") in errors[0]
    assert lab.registry.models.numbers("more") == [] and registry_faults(lab.registry) == []
    assert list((lab.home / "models").glob(".*.tmp")) == []
    monkeypatch.undo()
    assert main(words) == 0
    assert lab.registry.models.numbers("more") == [1]
