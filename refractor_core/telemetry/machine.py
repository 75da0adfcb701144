"""What the machine is that a figure was taken on: figures without it cannot be compared."""

import os
import platform
import sys
from pathlib import Path


def machine() -> dict[str, object]:
    """Host, processor, cores, memory in bytes, accelerators and versions, for events, reports and benchmark records."""
    import torch

    accelerators = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "host": platform.node(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "accelerators": accelerators,
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": ".".join(map(str, sys.version_info[:3])),
        "torch": torch.__version__,
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(errors="replace").splitlines():
            if line.lower().startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
