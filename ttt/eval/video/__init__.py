"""Tasks on what diffusion backbones denoise and make; brought by the hook `ttt_eval_tasks` like any plugin's."""
