# python train_base.py configs/sorting_base.py
task = "sorting_algorithms"
steps = 9600
crop = 24
