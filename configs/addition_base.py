# python train_base.py configs/addition_base.py
task = "multidigit_addition"
steps = 4000
