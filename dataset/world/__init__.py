"""The embedded world: objects (openmoji), scenes, words for them, questions, inventories, and other drawings and figures."""
