# python train_base.py configs/base_conversion_base.py
task = "base_conversion"
steps = 7200
weight_decay = 0.2
