"""What each command does: refbn_d2/commands/NAME.py has main(), tools/ starts it."""

import warnings

# A command's process is its own: what detectron2 and fvcore meet when they are imported, and no
# user can act on, is not shown.
warnings.filterwarnings("ignore", ".*torch.jit.script. is deprecated", FutureWarning)
