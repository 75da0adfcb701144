"""What a machine is, in words that a record can keep."""

import json
import os

from refractor_core.telemetry.machine import machine


def test_a_machine_is_described_in_json():
    found = json.loads(json.dumps(machine()))
    assert found["cores"] == os.cpu_count() and found["memory"] > 2**28
    assert found["processor"] and found["python"].count(".") == 2
