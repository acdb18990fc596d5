"""What can go wrong in the process that compiles, which imports these by name.

May be changed here: mishaps that have been seen.
"""

import os
import sys

import jax

from gsa_jax import InputError

TOO_LARGE = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 18.25G of 15.75G hbm. Exceeded by 2.50G."


def dies(devices, said, code):
    sys.stderr.write(said)
    sys.stderr.flush()
    os.kill(os.getpid(), code)


def refuses(devices):
    raise InputError("no such run")


def is_wrong(devices):
    return devices[len(devices)]


class TooLarge:
    def compile(self, compiler_options):
        raise jax.errors.JaxRuntimeError(TOO_LARGE)


class Unsupported:
    def compile(self, compiler_options):
        raise jax.errors.JaxRuntimeError("UNIMPLEMENTED: not on\nthis chip")


def lowered(devices, kind):
    return kind()
