# python train_base.py configs/tiny_base.py
# about 10 seconds: a small grid and a small model, for tests and for stepping through with a debugger
task = "grid_pathfinding"
task_sizes = {"side": 8, "max_distance": 3}
n_layer = 2
n_head = 2
n_embd = 64
block_size = 48
steps = 240
batch_size = 32
eval_every = 120
eval_size = 64
final_eval_size = 64
warmup = 20
