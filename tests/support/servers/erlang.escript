%%! -noshell
%% An SSH server on Erlang's ssh application, with the forwarding that it comes with; takes any key.
%%
%% escript erlang.escript [forbid] HOST_KEY    prints its port; forbid: it forwards nothing, as is its default

main(["forbid", Key]) -> serve(Key, false);
main([Key]) -> serve(Key, true).

serve(Key, Forwards) ->
    {ok, _} = application:ensure_all_started(ssh),
    Directory = Key ++ "-directory",
    ok = filelib:ensure_dir(Directory ++ "/ssh_host_ed25519_key"),
    {ok, _} = file:copy(Key, Directory ++ "/ssh_host_ed25519_key"),
    {ok, Daemon} = ssh:daemon({127, 0, 0, 1}, 0, [
        {system_dir, Directory},
        {user_dir, Directory},
        {no_auth_needed, true},
        {tcpip_tunnel_in, Forwards},
        {tcpip_tunnel_out, Forwards}
    ]),
    {ok, Facts} = ssh:daemon_info(Daemon),
    io:format("~b~n", [proplists:get_value(port, Facts)]),
    receive after infinity -> ok end.
