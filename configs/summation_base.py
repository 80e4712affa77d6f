# python train_base.py configs/summation_base.py
task = "list_summation"
