"""The commands: main() in refbn_d2/commands/NAME.py. The scripts in tools/ start them, too."""

import warnings

# Each command runs in its own process, so filters do not affect other code. Users cannot act on
# these warnings, which are about the code of detectron2 and fvcore.
warnings.filterwarnings("ignore", ".*torch.jit.script. is deprecated", FutureWarning)
warnings.filterwarnings("ignore", "torch.meshgrid: in an upcoming release", UserWarning)
