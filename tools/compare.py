#!/usr/bin/env python3
"""Does the norm really help? Compares detectors that differ in their norm."""

from refbn_d2.commands.compare import main

if __name__ == "__main__":
    main()
