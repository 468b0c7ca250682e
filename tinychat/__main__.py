from tinychat.cli import main

raise SystemExit(main())
