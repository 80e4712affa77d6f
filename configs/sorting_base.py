# python train_base.py configs/sorting_base.py
task = "sorting_algorithms"
steps = 4400
crop = 24
