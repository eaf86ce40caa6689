"""Starting runs: processes of one machine here; other machines in the folder `launch/`."""
