# python train_base.py configs/base_conversion_base.py
task = "base_conversion"
task_sizes = {"max_value": 1023}  # twice the inputs of the default, too many to learn by heart
steps = 3600
weight_decay = 0.1
