#!/usr/bin/env python3
"""The paper's Table 3: pretrains, converts, trains detectors and writes the report."""

from refbn_d2.commands.reproduce_table3 import main

if __name__ == "__main__":
    main()
