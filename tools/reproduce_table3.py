#!/usr/bin/env python3
"""``refbn-d2 reproduce-table3``, from a checkout."""

from refbn_d2.__main__ import run_command

if __name__ == "__main__":
    run_command("reproduce-table3")
