# python train_base.py configs/sorting_base.py
task = "sorting_algorithms"
steps = 5200
crop = 24
