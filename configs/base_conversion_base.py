# python train_base.py configs/base_conversion_base.py
task = "base_conversion"
steps = 3000
batch_size = 64
