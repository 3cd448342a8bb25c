"""Train with a recipe of this package: ``accelerate launch -m timm_sugar.training --recipe NAME [--key value ...]``."""

from . import main

if __name__ == "__main__":
    main("timm_sugar.training", str(__doc__), recipe="digits")
