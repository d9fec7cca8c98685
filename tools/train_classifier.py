#!/usr/bin/env python3
"""Trains or evaluates an image classifier; the command line is detectron2's own."""

from refbn_d2.commands.classify import main

if __name__ == "__main__":
    main()
