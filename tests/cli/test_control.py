"""``refractor pause`` and ``refractor save`` leave a wish for a job that runs, and for no other."""

import pytest

from refractor_core.cli.main import main
from refractor_core.telemetry.records import write_status


@pytest.mark.parametrize("command", ["pause", "save"])
def test_only_a_running_job_is_asked(tmp_path, capsys, command):
    assert main([command, str(tmp_path)]) == 1
    assert "no run directory" in capsys.readouterr().err
    for state in ("paused", "completed", "failed"):
        write_status(tmp_path / "status.json", state=state, step=3)
        assert main([command, str(tmp_path)]) == 1
        assert f"no job runs there (its state is '{state}')" in capsys.readouterr().err
    assert not (tmp_path / "requests").exists()
    write_status(tmp_path / "status.json", state="running", step=3)
    assert main([command, str(tmp_path)]) == 0
    assert (tmp_path / "requests" / command).exists()
