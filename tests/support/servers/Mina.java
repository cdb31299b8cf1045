/*
 * Apache MINA SSHD, with forwarding, SFTP, and commands run by /bin/sh as its own factory runs them; takes any key.
 *
 * java Mina.java HOST_KEY    prints its port
 */

import java.nio.file.Paths;
import java.util.Collections;
import org.apache.sshd.common.keyprovider.FileKeyPairProvider;
import org.apache.sshd.server.SshServer;
import org.apache.sshd.server.auth.pubkey.AcceptAllPublickeyAuthenticator;
import org.apache.sshd.server.forward.AcceptAllForwardingFilter;
import org.apache.sshd.server.shell.ProcessShellFactory;
import org.apache.sshd.sftp.server.SftpSubsystemFactory;

public class Mina {
    public static void main(String[] words) throws Exception {
        SshServer server = SshServer.setUpDefaultServer();
        server.setHost("127.0.0.1");
        server.setPort(0);
        server.setKeyPairProvider(new FileKeyPairProvider(Paths.get(words[0])));
        server.setPublickeyAuthenticator(AcceptAllPublickeyAuthenticator.INSTANCE);
        server.setForwardingFilter(AcceptAllForwardingFilter.INSTANCE);
        server.setSubsystemFactories(Collections.singletonList(new SftpSubsystemFactory()));
        server.setCommandFactory(
            (channel, command) -> new ProcessShellFactory(command, "/bin/sh", "-c", command).createShell(channel));
        server.start();
        System.out.println(server.getPort());
        Thread.currentThread().join();
    }
}
