"""Tasks on speech, for every backbone that scores speech; brought by the hook `ttt_eval_tasks` like any plugin's."""
