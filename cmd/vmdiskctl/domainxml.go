package main

import (
	"fmt"

	"github.com/spf13/cobra"

	"github.com/vmdiskd/vmdiskd/internal/attach"
)

func newDomainXML() *cobra.Command {
	f := &attachFlags{}
	c := &cobra.Command{
		Use:   "domain-xml VM IMAGE",
		Short: "Print the element of a disk for a libvirt domain",
		Long: `Print the element of a disk for the description of a libvirt domain, for people
who edit it themselves. IMAGE is as with attach. Nothing is changed. For a URI
and with --target libvirt is not asked.`,
		Args: cobra.ExactArgs(2),
		RunE: func(c *cobra.Command, args []string) error {
			text, err := f.element(c, args[0], args[1])
			if err != nil {
				return plugError(err)
			}
			_, err = fmt.Fprintln(c.OutOrStdout(), text)
			return err
		},
	}
	f.addSocket(c)
	f.libvirt.add(c)
	f.addSource(c)
	f.addDevice(c)
	return c
}

func (f *attachFlags) element(c *cobra.Command, vm, image string) (string, error) {
	o, err := f.options(c)
	if err != nil {
		return "", err
	}
	vm, err = f.find(vm)
	if err == nil && f.via == viaQMP {
		err = usage("VM is a QMP socket, and no domain of libvirt")
	}
	if err != nil {
		return "", err
	}
	s, err := f.source(c, vm, image)
	defer closeFiles(s.Files)
	if err != nil {
		return "", err
	}
	if s.URI != "" && o.ID != "" {
		return attach.Element(s, o)
	}
	m, done, err := f.overLibvirt(c.Context(), vm)
	if err != nil {
		return "", err
	}
	defer done()
	return m.Element(c.Context(), s, o)
}
