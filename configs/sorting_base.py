# python train_base.py configs/sorting_base.py
task = "sorting_algorithms"
steps = 3300
batch_size = 64
eval_every = 500
