"""TTT in CogVideoX's video diffusion transformer: segment attention, and a layer that reads the video both ways."""
