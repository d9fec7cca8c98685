#!/usr/bin/env python3
"""``refbn-d2 compare``, from a checkout."""

from refbn_d2.__main__ import run_command

if __name__ == "__main__":
    run_command("compare")
