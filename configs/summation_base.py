# python train_base.py configs/summation_base.py
task = "list_summation"
lr = 0.02
