// An SSH server on Go's gliderlabs/ssh, with the forwarding that it comes with, and commands; takes any key.
//
//	gliderlabs HOST_KEY    prints its port
package main

import (
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"

	"github.com/gliderlabs/ssh"
)

func run(session ssh.Session) {
	command := exec.Command("/bin/sh", "-c", session.RawCommand())
	command.Stdout, command.Stderr = session, session.Stderr()
	stdin, err := command.StdinPipe()
	if err != nil || command.Start() != nil {
		session.Exit(1)
		return
	}
	go func() {
		io.Copy(stdin, session)
		stdin.Close()
	}()
	command.Wait()
	session.Exit(command.ProcessState.ExitCode() & 255)
}

func main() {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		panic(err)
	}
	forwards := &ssh.ForwardedTCPHandler{}
	server := &ssh.Server{
		Handler:                       run,
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
