"""What each command does: refbn_d2/commands/NAME.py has main(), tools/ starts it."""

import warnings

# A command's process is its own: warnings about the code of detectron2 and fvcore, on which no
# user can act, are not shown.
warnings.filterwarnings("ignore", ".*torch.jit.script. is deprecated", FutureWarning)
warnings.filterwarnings("ignore", "torch.meshgrid: in an upcoming release", UserWarning)
