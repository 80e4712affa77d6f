# python train_base.py configs/sorting_base.py
task = "sorting_algorithms"
steps = 4200
crop = 24
