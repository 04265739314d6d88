"""What tox has to know beyond tox.ini; tox loads this file by itself."""

from __future__ import annotations

import os
import sys
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING

from tox.plugin import impl

if TYPE_CHECKING:
    from tox.config.sets import ConfigSet
    from tox.session.state import State


@impl
def tox_add_core_config(core_conf: ConfigSet, state: State) -> None:
    # pyenv puts only its selected versions on PATH: look into all of its versions too, after everything else.
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    versions = sorted(str(path) for path in pyenv.glob("versions/*/bin"))
    os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", os.defpath), *versions])

    # A missing interpreter is skipped, but not all of them: the one that runs tox is always among those tested.
    free_threaded = "t" if sysconfig.get_config_var("Py_GIL_DISABLED") else ""
    running = f"py{sys.version_info.major}{sys.version_info.minor}{free_threaded}"
    if running not in (envs := core_conf["env_list"].envs):
        envs.insert(0, running)
