"""Fine-tune a pretrained network, timm's ResNet-18 from ImageNet or --pretrained, on a folder of your own images.

accelerate launch train/finetune.py --data path/to/folder [--key value ...]
"""

from timm_sugar.training import main

if __name__ == "__main__":
    main(__file__, __doc__, recipe="finetune")
