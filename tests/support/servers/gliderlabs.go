// An SSH server on Go's gliderlabs/ssh, with the forwarding that it comes with; takes any key.
//
//	gliderlabs HOST_KEY    prints its port
package main

import (
	"fmt"
	"net"
	"os"

	"github.com/gliderlabs/ssh"
)

func main() {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		panic(err)
	}
	forwards := &ssh.ForwardedTCPHandler{}
	server := &ssh.Server{
		Handler:                       func(session ssh.Session) { session.Exit(1) },
		PublicKeyHandler:              func(ssh.Context, ssh.PublicKey) bool { return true },
		LocalPortForwardingCallback:   func(ssh.Context, string, uint32) bool { return true },
		ReversePortForwardingCallback: func(ssh.Context, string, uint32) bool { return true },
		ChannelHandlers: map[string]ssh.ChannelHandler{
			"session":      ssh.DefaultSessionHandler,
			"direct-tcpip": ssh.DirectTCPIPHandler,
		},
		RequestHandlers: map[string]ssh.RequestHandler{
			"tcpip-forward":        forwards.HandleSSHRequest,
			"cancel-tcpip-forward": forwards.HandleSSHRequest,
		},
	}
	if err := server.SetOption(ssh.HostKeyFile(os.Args[1])); err != nil {
		panic(err)
	}
	fmt.Println(listener.Addr().(*net.TCPAddr).Port)
	panic(server.Serve(listener))
}
