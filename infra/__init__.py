"""Where it runs: settings, storage, clusters and the server. Imports nothing else of brainloom."""
