"""Where to run: this machine, hosts over ssh, Slurm.

In: a configuration file, settings and what the user asks of machines.
Out: rendered commands and job scripts (pure), and the processes that `processes` starts from them.
Never: imports trainer, sparsity or torch.
"""
