#!/usr/bin/env python3
"""Trains or evaluates a detector; the command line is detectron2's own."""

from refbn_d2.commands.train import main

if __name__ == "__main__":
    main()
