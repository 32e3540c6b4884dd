"""A run as a job of a cluster: what it asks for, its script, and how it is submitted to Slurm by submitit.

    request.py       what a job asks the cluster for, and whether that can be asked
    script.py        the script, which is what runs: `srun` starts `ttt train` once for each device
    submission.py    what is looked at first, and the submission

Nothing here imports torch, and submitit only once a script is made.
"""
