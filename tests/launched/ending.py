"""The end of a launched process, without the teardown of the interpreter, in which a rank whose work was done aborted
("terminate called without an active exception"), as threads do that want the lock of an interpreter that ends."""

import os
import sys


def end(trainer):
    trainer.end()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
