# python train_base.py configs/sorting_base.py
task = "sorting_algorithms"
steps = 7000
batch_size = 32
chunks = 2
