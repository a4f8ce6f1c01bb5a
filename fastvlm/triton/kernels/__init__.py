"""Device code: what runs on the GPU. Nothing here knows torch; the launchers are a floor up."""
