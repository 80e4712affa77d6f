# python train_base.py configs/base_conversion_base.py
task = "base_conversion"
steps = 4000
