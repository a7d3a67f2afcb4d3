package main

// elsewhere has options of nbdkit and qemu-nbd that vmdiskd does not have, or not
// by that name, and what to do instead.
var elsewhere = map[string]string{
	"k": "the Unix socket is --unix=PATH", "socket": "the Unix socket is --unix=PATH",
	"b": "the address is --ipaddr=ADDRESS", "bind": "the address is --ipaddr=ADDRESS",
	"x": "the name is --exportname=NAME", "export-name": "the name is --exportname=NAME",
	"read-only": "it is --readonly",
	"pid-file":  "it is --pidfile=FILE",
	"shared":    "a disk is always shared", "persistent": "the server always goes on when a client leaves",
	"fork":        "the process stays in the foreground; systemd does the rest",
	"dump-plugin": "it is --dump-config",
	"tls-creds":   "it is --tls=require and --tls-certificates=DIRECTORY",
	"aio":         "it is --engine",
	"nocache":     "it is --cache=none",
	"A":           "clients ask for the context qemu:allocation-depth", "allocation-depth": "clients ask for the context qemu:allocation-depth",
	"B": "clients ask for the context qemu:dirty-bitmap:NAME", "bitmap": "clients ask for the context qemu:dirty-bitmap:NAME",
	"l": "it is --snapshot=ID|NAME", "load-snapshot": "it is --snapshot=ID|NAME",
	"offset": "window and partition are keys of the file of --config",
	"filter": "layers are keys of the file of --config",
	"c":      "vmdiskctl device attach does that", "connect": "vmdiskctl device attach does that",
	"d": "vmdiskctl device detach does that", "disconnect": "vmdiskctl device detach does that",
	"L": "vmdiskctl info --list does that", "list": "vmdiskctl info --list does that",
}
