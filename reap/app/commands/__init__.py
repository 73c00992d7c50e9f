"""One file per stage of the work; importing one adds its commands to `reap.app.cli.app`."""
