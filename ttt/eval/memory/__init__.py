"""Tasks that ask what fast weights remember and learn, for every backbone that scores; brought by the hook."""
