"""The worker process, from its command line to its end."""

from __future__ import annotations

import logging
import os
import sys
from typing import NoReturn

from nanovllm.exit_codes import EXIT_FOLLOWED
from nanovllm.service import service_command
from nanovllm.services.gpu_worker.loop import serve
from nanovllm.services.gpu_worker.runner import GroupBroken

log = logging.getLogger(__name__)


def main() -> NoReturn:
    """Runs the command, and ends the process without the interpreter's own exit.

    That exit would destroy torch and its process group while the device thread may be inside a
    collective, which can hang or crash. A worker has nothing to save.
    """
    code = 1
    try:
        service_command("gpu_worker", serve, on_step_path=True).main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except GroupBroken as error:
        log.error("%s", error)
        code = EXIT_FOLLOWED
    except BaseException:
        log.exception("gpu_worker ends")
    finally:
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
