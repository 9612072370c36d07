"""A second run finds the graphs that the first one compiled, those of packed layers too."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def test_a_second_process_finds_the_compiled_layers(tmp_path: Path) -> None:
    script, told = Path(__file__).with_name("cached.py"), []
    for _ in range(2):
        env = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
        done = subprocess.run([sys.executable, script], env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        told.append(done.stdout.splitlines()[-4:])
    (first, *counted), (second, *counted_again) = told
    assert counted == ["1", "0", "0"] and counted_again == ["0", "1", "0"], "misses, hits, and graphs that no cache takes"
    assert first == second
