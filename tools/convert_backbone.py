#!/usr/bin/env python3
"""Turns a ResNet's weights into a file that a detector starts from (MODEL.WEIGHTS), or back."""

from refbn_d2.commands.convert import main

if __name__ == "__main__":
    main()
