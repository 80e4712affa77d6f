# python train_base.py configs/sorting_base.py
task = "sorting_algorithms"
steps = 6400
crop = 24
